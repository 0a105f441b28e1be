"""What TensorRT and TensorRT-RTX share, which is nearly everything: both are the nvinfer API."""
