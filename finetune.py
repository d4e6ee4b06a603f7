"""Launcher of `fcmae.finetune`: accelerate launch finetune.py --config FILE key=value ..."""

from fcmae.finetune import run

if __name__ == "__main__":
    run()
