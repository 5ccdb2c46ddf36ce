"""`python -m miniclip.kernels.check`: checks and times the kernels on a GPU; see `miniclip.bench.kernel_check`."""

import sys

if __name__ == "__main__":
    from miniclip.bench.kernel_check import main

    sys.exit(main())
