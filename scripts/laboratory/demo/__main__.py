"""Command line of the demo; see scripts/demo."""

from laboratory.demo.options import parse_arguments

if __name__ == "__main__":
    parse_arguments()  # help and mistakes are answered before anything is imported
    from laboratory.demo.run import main

    raise SystemExit(main())
