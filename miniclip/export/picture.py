"""The preparation of a picture as ONNX: `miniclip.preprocess` of an RGB picture, as a graph before the image tower.

    picture uint8 [height, width, 3], RGB, of any size  ->  pixels float32 [1, 3, R, R]

ONNX's Resize with antialiasing, on bytes, filters as Pillow does, up to a rounding: README.md in this folder says how
far the pixels are from Pillow's. What differs from one Resize node:

- Each pass is a node of its own, because Pillow filters tall pictures along the height first: the passes are height,
  width, height, and either the first or the last changes nothing.
- The sizes are computed from the picture's shape in whole numbers. ONNX's own `keep_aspect_ratio_policy` rounds the
  longer side to the nearest, and Pillow's caller rounds it down.
- ONNX can't raise an error. Where a picture can't be resized, Gather takes an element that does not exist, and the
  runtime's error shows that node's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miniclip.config import PreprocessConfig, check_known
from miniclip.preprocess import MAX_RESIZED_PIXELS

if TYPE_CHECKING:
    import onnx

PICTURE, PIXELS = "picture", "pixels"
RESIZES = {  # attributes of ONNX's Resize
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1',
    "bilinear": 'mode = "linear", antialias = 1, exclude_outside = 1',
}
SIZES = {  # the size that the whole picture is resized to
    "shortest": """
        short = Min (height, width)
        short_or_1 = Max (short, one)
        side_times_height = Mul (side, height)
        side_times_width = Mul (side, width)
        new_height = Div (side_times_height, short_or_1)
        new_width = Div (side_times_width, short_or_1)""",
    "squash": """
        new_height = Identity (side)
        new_width = Identity (side)""",
}
GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}]>
prepare (uint8[height, width, 3] picture) => (float[1, 3, {side}, {side}] pixels)
<
    int64[1] side = {{{side}}}, int64[1] most_pixels = {{{most_pixels}}},
    int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
    int64[2] height_and_width = {{2, 3}}, float most = {{255}},
    float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] std = {{{std}}}
>
{{
        height = Shape <start = 0, end = 1> (picture)
        width = Shape <start = 1, end = 2> (picture)
        {sizes}

        area = Mul (height, width)
        is_empty = Equal (area, zero)
        is_empty_0_or_1 = Cast <to = 7> (is_empty)
        ["the picture has no pixels"] channels = Gather (three, is_empty_0_or_1)
        rows = Max (height, new_height)
        resized_pixels = Mul (new_width, rows)
        is_large = Greater (resized_pixels, most_pixels)
        is_large_0_or_1 = Cast <to = 7> (is_large)
        ["the resized picture would have over {most_pixels} pixels; crop it to a less extreme aspect ratio first"]
        batch = Gather (one, is_large_0_or_1)

        less_height = Sub (height, new_height)
        less_width = Sub (width, new_width)
        twice_less_width = Mul (two, less_width)
        much_less = Max (twice_less_width, zero)
        is_tall = Greater (less_height, much_less)
        first_height = Where (is_tall, new_height, height)
        first_size = Concat <axis = 0> (batch, channels, first_height, width)
        second_size = Concat <axis = 0> (batch, channels, first_height, new_width)
        third_size = Concat <axis = 0> (batch, channels, new_height, new_width)
        planes = Transpose <perm = [2, 0, 1]> (picture)
        image = Unsqueeze (planes, zero)
        first = Resize <{resize}> (image, , , first_size)
        second = Resize <{resize}> (first, , , second_size)
        resized = Resize <{resize}> (second, , , third_size)

        new_size = Concat <axis = 0> (new_height, new_width)
        excess = Sub (new_size, side)
        half = Div (excess, two)
        half_is_odd = Mod (half, two)
        rounded = Add (excess, half_is_odd)
        start = Div (rounded, two)
        end = Add (start, side)
        cropped = Slice (resized, start, end, height_and_width)

        bytes = Cast <to = 1> (cropped)
        fractions = Div (bytes, most)
        centered = Sub (fractions, mean)
        pixels = Div (centered, std)
}}
"""


def graph_text(config: PreprocessConfig, opset: int) -> str:
    """The graph in ONNX's textual syntax."""
    check_known(config.resize_mode)
    return GRAPH.format(
        opset=opset,
        side=config.image_size,
        sizes=SIZES[config.resize_mode],
        most_pixels=MAX_RESIZED_PIXELS,
        resize=RESIZES[config.interpolation],
        mean=", ".join(map(repr, config.mean)),
        std=", ".join(map(repr, config.std)),
    )


def picture_graph(config: PreprocessConfig, opset: int) -> onnx.ModelProto:
    """The preparation of an RGB picture as this config has it, as a model of its own."""
    import onnx.parser

    return onnx.parser.parse_model(graph_text(config, opset))


def put_before(tower: onnx.ModelProto, config: PreprocessConfig, opset: int) -> None:
    """Make a tower that takes pixels take a picture instead, in place, and return the pixels too."""
    import onnx.compose

    before = onnx.compose.add_prefix(
        picture_graph(config, opset), "picture/", rename_inputs=False, rename_outputs=False, rename_nodes=False
    )
    graph = tower.graph
    nodes = [*before.graph.node, *graph.node]
    del graph.input[:], graph.node[:]
    graph.input.extend(before.graph.input)
    graph.node.extend(nodes)
    graph.initializer.extend(before.graph.initializer)
    graph.output.extend(before.graph.output)
