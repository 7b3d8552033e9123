"""What the authors and curious users run from a checkout; it imports the plug-in and is not installed with it."""
