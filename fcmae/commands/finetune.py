"""`fcmae finetune`: the story `fcmae.finetune`, which parses the arguments itself."""

from fcmae.finetune import main as main
