"""Bytes that nobody sane would write, for everything that this project reads: files, messages, answers.

`python -m tests.fuzz --seed N --runs N` changes real ones (`corpus`) by a seed (`mutate`), and gives them to
what reads them (`targets`). A reader may refuse with the errors that it declares, and with no others; and
nothing is written or deleted outside the folders that are its own.

Not atheris: its wheels are for x86-64 alone, elsewhere it needs clang, and `make test` must run there, too.
The targets are functions of bytes, so that it can drive them where it is: `atheris.Setup(argv, target)`.
"""
