"""The speed of miniclip beside its peers. All run with the same weights and inputs, alternately in one process, and
every output is compared with miniclip's.

    run.py       from settings to a report
    settings.py  what to measure
    measure.py   alternating runs; latency statistics
    peers.py     openai/CLIP, open_clip, transformers and onnxruntime, where they are installed
    tasks.py     what is timed
    report.py    table and bar chart
"""
