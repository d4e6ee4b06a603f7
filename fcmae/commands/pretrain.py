"""`fcmae pretrain`: the story `fcmae.pretrain`, whose arguments are in `fcmae.arguments`."""

from functools import partial

from fcmae import arguments

NAME = "fcmae pretrain"
make_parser = partial(arguments.pretrain_parser, NAME)
main = partial(arguments.pretrain, prog=NAME)
