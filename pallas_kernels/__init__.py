"""Operations of a ModuleFormer that have kernels of their own."""
