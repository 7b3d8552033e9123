"""Studies of a trained model on labelled cases: steps, seeds, samples, mirrors and tiles."""
