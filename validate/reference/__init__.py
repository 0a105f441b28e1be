"""PyTorch references: Hugging Face's own modules, run layer by layer. They share no code with the other rooms."""
