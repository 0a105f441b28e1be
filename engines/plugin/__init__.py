"""The top-k gather as one GPU kernel, and as a plugin of TensorRT and TensorRT-RTX.

**Why it exists.** In standard operators (graphs/gather.py) the gather is two sorts and some twenty small operators,
of which TensorRT-RTX leaves two or three kernels a cut and TensorRT has never said what it leaves. As a plugin it is
one launch. On TensorRT the kernel is inside the engine, which runs from C++ without Python.

**What is known.** Under Triton's interpreter the kernel is bit-exact against the standard operators; its PTX
assembles for every target without spills; TensorRT-RTX builds engines with it; the genuine `tensorrt.plugin` asks it
for types, shapes, launch and PTX. It has never run on a GPU; `launch` is tested over a stand-in of cuda-core 1.2.

**What a GPU run must show for it to remain** (`make bench-gpu` measures the kernel against its memory bound):

1. kept sets identical to `--gather ops` and to the reference, at batch 1 and 8, with equal scores at the cut;
2. a launch within twice its memory bound, which moving [B,K,D] sets, at the shapes of LLaVA-7B's two cuts;
3. the chain vision, prefix, k1, k2, captured as one CUDA graph, no slower than with `--gather ops`;
4. on TensorRT, an engine that a C++ process opens and runs.

What fails 1 or 2 is mended or goes; if 3 fails, the plugin goes, and `--gather` with it.

`kernel` is the kernel, `ptx` compiles it without a GPU, `tensorrt` and `tensorrt_rtx` are the two plugins, `launch`
starts it from TensorRT-RTX's. Their tests: tests/engines/plugin/.
"""
