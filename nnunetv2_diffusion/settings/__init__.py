"""What plans may say, by method."""
