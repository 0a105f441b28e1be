"""Is a bundle as fast as its FLOPs promise? An interleaved benchmark beside the unpruned model and PyTorch."""
