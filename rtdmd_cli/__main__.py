"""`rtdmd`, and `python -m rtdmd_cli`: the program, where it can run."""

import sys


def main() -> int:
    """Run the program with the process's arguments; its exit code. 3 on Windows, which lacks what it imports."""
    if sys.platform == "win32":
        print("error: rtdmd needs Linux or macOS.", file=sys.stderr)
        print(
            "hint: On Windows, install it inside WSL2: https://learn.microsoft.com/windows/wsl/install",
            file=sys.stderr,
        )
        return 3
    from rtdmd_cli.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
