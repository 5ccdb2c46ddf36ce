import sys

from miniclip.commands import main

sys.exit(main())
