"""What makes a method that method: its process, network, loss and defaults, one module each.

A method is a subclass of ``DiffusionTrainer`` that overrides what differs. Planner, predictor, warm start and pictures
ask trainer and network, and know no method by name. The strategies of the recycling family differ in one attribute and
have no module of their own (``training.strategies``).
"""
