"""PyTorch references: Hugging Face's own modules, run layer by layer. It shares no code with the rooms it judges."""
