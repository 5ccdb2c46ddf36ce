"""A model as a page: `export_web` writes a folder that any file server serves, and that needs no network.

    folder.py       the folder: page, model, vocabulary, goldens of the self-test
    index.html, style.css, icon.svg, page.js     the page
    worker.js, files.js, onnx.js, self_test.js   the model in a Web Worker; examples/port_js computes what is not ONNX
"""

from miniclip.web.folder import export_web

__all__ = ["export_web"]
