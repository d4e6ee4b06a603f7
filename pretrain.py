"""Launcher of `fcmae.pretrain`: accelerate launch pretrain.py --config NAME key=value ..."""

from fcmae.arguments import run

if __name__ == "__main__":
    run("pretrain")
