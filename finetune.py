"""Launcher of `fcmae.finetune`: accelerate launch finetune.py --config NAME key=value ..."""

from fcmae.arguments import run

if __name__ == "__main__":
    run("finetune")
