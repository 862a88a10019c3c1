"""`python -m labs` is `llmlab`."""

from labs.cli import main

if __name__ == "__main__":
    main()
