"""Launcher of `fcmae.pretrain`: accelerate launch pretrain.py --config FILE key=value ..."""

from fcmae.pretrain import run

if __name__ == "__main__":
    run()
