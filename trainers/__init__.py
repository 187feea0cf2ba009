"""The GPU programs; whatever they import, a library that does without one of its own extras is no news on standard error."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns while it is imported, on CPUs with AVX-512 BF16
