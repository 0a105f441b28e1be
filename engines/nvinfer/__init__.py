"""What TensorRT and TensorRT-RTX share, which is nearly everything: both are the nvinfer API.

Building has run; running (`run`, `cuda_memory`, `cuda_graph`) has not been on hardware yet: it is written from the
documentation of the API and of cuda-core 1.2, and tested over stand-ins with their signatures.
"""
