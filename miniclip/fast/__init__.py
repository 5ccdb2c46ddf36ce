"""The towers as inference runs them: fewer steps, less memory, packed weights; equal to the plain forms up to rounding.

Read `miniclip.models` first: nothing here says what CLIP computes, and nothing in `miniclip.models` knows these forms.
`clip.py` is the model that `load` returns, `towers.py` has the forms, `half.py` and `int8.py` the matrix products with
weights in half precision and in eight-bit integers, `rates.py` measures which dtype is fast on this machine.
"""
