"""DiffCode medical image restoration: one shared network for CT, PET and MR."""
