"""Exit with a message for a make target that does not exist. If it was renamed, the new name is given."""

import sys

from layerwise.schema import RENAMED_TARGETS


def main(target: str) -> None:
    if target in RENAMED_TARGETS:
        print(f"make {target} is now make {RENAMED_TARGETS[target]}", file=sys.stderr)
    else:
        print(f"{target} is neither a target nor a file: make help lists the targets", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
