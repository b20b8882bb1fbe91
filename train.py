"""Train a recipe: `python train.py model=resnet init=he_normal norm=group optimizer=muon`."""

from knep.cli.train import main

if __name__ == "__main__":
    main()
