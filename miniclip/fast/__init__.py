"""The towers as inference runs them: fewer steps, less memory, packed weights; equal to the plain forms up to rounding.

Read `miniclip.models` first: nothing here says what CLIP computes, and nothing in `miniclip.models` knows these forms.

clip.py                      the model that `load` returns: its towers run in these forms where they apply
untouched.py                 when they apply
prepared.py                  what is derived from weights, and how a change of a weight is noticed
vit.py  text.py  resnet.py   the towers on a CPU
blocks.py  pooled.py         their parts: transformer blocks; attention with a single query
linear.py  conv.py           their layers, with packed weights
half.py  int8.py             layers with half-precision weights on CPUs that can't compute with them, and with integers
rates.py                     which dtype is fastest on this machine
gpu.py  ops.py  graphs.py    the transformers on a GPU, their fused operations, CUDA graphs
"""
