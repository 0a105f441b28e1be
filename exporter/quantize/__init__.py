"""A checkpoint's linear layers in fewer bits: rounded here, or taken over from a checkpoint that has them rounded."""
