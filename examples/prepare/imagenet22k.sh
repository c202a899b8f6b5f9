#!/usr/bin/env bash
# ImageNet-22K (ImageNet-21K, the autumn 2011 release): about 14 million images without labels.
# Download from image-net.org (registration): the tar of tars, one per synset. Unpack it once, not the inner tars:
# they are read as they are. Folders of images, one per synset, do as well.
# Layout:
#   RAW/imagenet22k/n*.tar  or  RAW/imagenet22k/n*/*.JPEG
# Makes DATA/imagenet22k_train. Variables: examples/prepare/common.sh.
source "$(dirname "$0")/common.sh"
need "$RAW/imagenet22k" "the tars of the synsets, or their folders"
images imagenet22k_train --input "$RAW/imagenet22k"
