"""The towers as inference runs them: fewer steps, less memory, packed weights; equal to the plain forms up to rounding.

Read `miniclip.models` first: nothing here says what CLIP computes, and nothing in `miniclip.models` knows these forms.

clip.py       the model that `load` returns: its towers run in these forms where untouched.py says that they apply
untouched.py  when they apply
vit.py  text.py  resnet.py   the towers on a CPU, made of blocks.py (transformer blocks) and pooled.py (one query)
gpu.py  ops.py                the transformers on a GPU, and their fused operations
graphs.py     small batches on a GPU as CUDA graphs
half.py  int8.py             matrix products with half-precision weights and with eight-bit integers
rates.py      measures which dtype is fast on this machine
"""
