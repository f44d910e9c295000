"""Read, write and edit the file formats of torch: zip, legacy, tar, TorchScript and torch.export."""
