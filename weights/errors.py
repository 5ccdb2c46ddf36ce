from miniclip.errors import MiniclipError


class CheckpointError(MiniclipError, RuntimeError):
    """A checkpoint that can't be used: the message names the file or tensor, what was got, expected, and what to do."""
