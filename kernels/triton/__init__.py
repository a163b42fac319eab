"""The Triton kernels, imported as `pyfast.kernels`; pyfast/triton_rooms.py registers them.

To add an operation, write <op>.py beside this file: its jit kernels, its pure `launch_config`, and
one room per schema of csrc/bindings.cpp, `<op>_triton` and `<op>_backward_triton`, with exactly the
schema's arguments and results. Nothing is registered by hand: a file of the operation's name is
enough for CUDA tensors, and for CPU tensors inside `with pyfast.using("triton"):`, where the
emulator of tests/emulator runs the kernels. A room

- checks what the kernels rely on with `guards`: `torch.ops.pyfast.*` may be called with anything,
  and must raise, never read out of bounds. `guards.operand` also copies what is not contiguous or
  not aligned to 16 bytes;
- launches nothing where there is nothing to do: an empty grid is an error;
- never waits for the device, writes to an input or changes the current device.
"""
