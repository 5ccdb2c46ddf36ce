"""miniclip beside its peers: the same weights and inputs, in one process, by turns, each answer checked against ours.

    measure.py   time by turns; latency statistics
    peers.py     openai/CLIP, open_clip, transformers and onnxruntime, where they are installed
    tasks.py     what is timed
    report.py    table, JSON, bar chart
"""
