"""A server: embeddings, classification, and the page of an index, over HTTP.

    batching.py   what many clients send at the same time is encoded together, by the one thread that owns the model
    inputs.py     the body of a request -> checked texts and pictures; limits; the errors that clients get
    pictures.py   an index that is searched while it may be updated; which pictures may be shown
    app.py        the routes: request -> answer
    server.py     HTTP: reading requests within limits of time and size, threads, stopping
"""
