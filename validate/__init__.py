"""What proves a bundle: the PyTorch reference, parity, and speed."""
