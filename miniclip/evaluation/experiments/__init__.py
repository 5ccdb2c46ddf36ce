"""Nine experiments with a CLIP: `miniclip explore NAME --model M [--out DIR]`, or in Python

    study = embed_study("tiny-ViT", *load("tiny-ViT"), read_dataset("sample"))
    result = temperature.measure(study)      # the figures, ready for JSON
    print(temperature.table(result))
    temperature.draw(result, study)          # a matplotlib figure

    models.py           what each model is made of; needs no study
    zero_shot.py        how many pictures get their right name
    cifar10.py          the same on CIFAR-10, by how the classes are worded
    mnist.py            the same on MNIST
    retrieval.py        the pictures nearest to some words
    embedding_space.py  what is near what; the modality gap
    benchmark.py        `miniclip bench`
    temperature.py      what the scale makes of cosines; calibration
    prompts.py          templates ranked, and ensembles

Each says at its top what its figures mean and what they don't. common.py is what they share, strategies.py what cifar10
and mnist share, options.py the command.
"""
