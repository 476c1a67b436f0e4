"""What touches the disk: whole-or-absent writing, hashes, tensors, pictures, faces; and a user's mistakes."""
