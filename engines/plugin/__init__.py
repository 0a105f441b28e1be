"""The top-k gather as one GPU kernel, and as a plugin of TensorRT and TensorRT-RTX."""
