"""`fcmae pretrain`: the story `fcmae.pretrain`, which parses the arguments itself."""

from fcmae.pretrain import main as main
