"""`fcmae finetune`: the story `fcmae.finetune`, whose arguments are in `fcmae.arguments`."""

from functools import partial

from fcmae import arguments

NAME = "fcmae finetune"
make_parser = partial(arguments.finetune_parser, NAME)
main = partial(arguments.finetune, prog=NAME)
