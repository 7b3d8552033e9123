"""``scripts/benchmark`` (first word: cli) and ``scripts/memory_table`` (memory)."""

import sys
from importlib import import_module

from laboratory.benchmarking.options import build_memory_parser, build_parser

if __name__ == "__main__":
    module = sys.argv.pop(1)
    {"cli": build_parser, "memory": build_memory_parser}[module]().parse_args()  # mistakes are told before an import
    sys.exit(import_module(f"laboratory.benchmarking.{module}").main())
