"""Training a net: from permitted samples and their features to a checkpoint that says what made it."""
