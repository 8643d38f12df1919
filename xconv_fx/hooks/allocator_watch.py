"""How many bytes PyTorch's CPU allocator holds at once, watched while a user's step runs.

The profiler tells the same, but belongs to a thread, cannot be stopped inside a backward (autograd puts the thread's
state back), and cannot run beside the user's own. So c10's allocator is wrapped by one that passes every call on and
counts: blocks that it handed out carry a deleter of ours, those from before do not, and their frees are therefore none
of the step's. It is installed while something is watched and put back after; blocks that outlive the watch are freed
through it all the same. Several watches may run at once, each with a beginning of its own.

Private parts of PyTorch, read in torch 2.13: `c10::SetCPUAllocator`, and Inductor's `CppCodeCache`, which builds the
dozen functions below once and keeps them on disk. Known gaps: every thread's tensors count, also those of a thread
that loads data; what libraries take outside of PyTorch's allocator is not seen.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

from .plain_library import plain_library

SOURCE = r"""
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

struct Block { int64_t size; uint64_t number; };
struct Watch { bool on = false; uint64_t start = 0; int64_t live = 0, most = 0; };

std::mutex mutex;
std::unordered_map<void*, Block> blocks;
std::map<int, Watch> watches;
uint64_t number = 0;
int paused = 0;
int begun = 0;
int watching = 0;
c10::Allocator* base = nullptr;
c10::DeleterFnPtr base_delete = nullptr;

void forget(std::unordered_map<void*, Block>::iterator found) {
  for (auto& [_, watch] : watches)
    if (watch.on && watch.start <= found->second.number) watch.live -= found->second.size;
  blocks.erase(found);
}

void remove(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = blocks.find(pointer);
    if (found != blocks.end()) forget(found);
  }
  base_delete(pointer);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    c10::DataPtr block = base->allocate(size);
    void* pointer = block.get();
    std::lock_guard<std::mutex> lock(mutex);
    if (!watching || pointer == nullptr) return block;
    // Freed by a deleter that is not ours, if it is known: a library's, that was paired with another allocator.
    auto known = blocks.find(pointer);
    if (known != blocks.end()) forget(known);
    if (!paused) {
      blocks[pointer] = {static_cast<int64_t>(size), number++};
      for (auto& [_, watch] : watches)
        if (watch.on) watch.most = std::max(watch.most, watch.live += static_cast<int64_t>(size));
    }
    if (!block.compare_exchange_deleter(base_delete, remove)) blocks.erase(pointer);
    return block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return remove; }
  bool is_simple_data_ptr(const c10::DataPtr& pointer) const override { return base->is_simple_data_ptr(pointer); }
  void copy_data(void* to, const void* from, size_t count) const override { base->copy_data(to, from, count); }
};

Counting* counting() {
  static auto* allocator = new Counting();
  return allocator;
}

}  // namespace

extern "C" {

// A watch that begins now; -1 when the allocator is of a kind that cannot be watched.
int xconv_begin() {
  std::lock_guard<std::mutex> lock(mutex);
  c10::Allocator* present = c10::GetCPUAllocator();
  if (present != counting()) {
    if (present->raw_deleter() == nullptr || (watching && present != base)) return -1;
    base = present;
    base_delete = present->raw_deleter();
  }
  if (!watching++) {
    blocks.clear();
    c10::SetCPUAllocator(counting(), 255);
  }
  watches[begun] = {true, number, 0, 0};
  return begun++;
}

// It counts no more, but what it counted can be asked for until it is forgotten.
void xconv_end(int index) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& watch = watches.at(index);
  if (!watch.on) return;
  watch.on = false;
  if (--watching) return;
  blocks.clear();
  // Of the highest priority, so that a later watch can be installed again.
  if (c10::GetCPUAllocator() == counting()) c10::SetCPUAllocator(base, 255);
}

void xconv_forget(int index) {
  xconv_end(index);
  std::lock_guard<std::mutex> lock(mutex);
  watches.erase(index);
}

// Watches that have not ended; with none, the allocator is as it was.
int xconv_watching() { std::lock_guard<std::mutex> lock(mutex); return watching; }

int64_t xconv_live(int index) { std::lock_guard<std::mutex> lock(mutex); return watches.at(index).live; }
int64_t xconv_most(int index) { std::lock_guard<std::mutex> lock(mutex); return watches.at(index).most; }

// The maximum is from here on that of what comes.
void xconv_restart(int index) {
  std::lock_guard<std::mutex> lock(mutex);
  watches.at(index).most = watches.at(index).live;
}

// Whether the block was allocated during the watch.
int xconv_owns(int index, void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(pointer);
  return found != blocks.end() && watches.at(index).start <= found->second.number;
}

// The block is as one from before the watch. Its bytes, or 0.
int64_t xconv_disown(int index, void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(pointer);
  if (found == blocks.end() || found->second.number < watches.at(index).start) return 0;
  int64_t size = found->second.size;
  forget(found);
  return size;
}

// What is allocated from here on until the same with -1 is not counted.
void xconv_pause(int more) { std::lock_guard<std::mutex> lock(mutex); paused += more; }

}
"""


@functools.cache
def _library() -> Any:
    from torch.utils.cpp_extension import TORCH_LIB_PATH

    # Inductor's own kernels need no symbol of torch's, so it does not link them.
    linked = (f"-L{TORCH_LIB_PATH}", "-Wl,--no-as-needed", "-lc10")
    library = plain_library(SOURCE, linked)
    for name in ("xconv_live", "xconv_most", "xconv_disown"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("xconv_owns", "xconv_disown"):
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_void_p]
    return library


def prepare() -> None:
    """Build what a watch needs: some seconds of a compiler, once on a machine. Raises what the build raises."""
    _library()


class CpuWatch:
    """The CPU allocator's bytes from the watch's beginning on, in all threads. Ends when nobody holds it.

    Raises `RuntimeError` when the allocator cannot be watched.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._index: int = self._library.xconv_begin()
        if self._index < 0:
            raise RuntimeError("PyTorch's CPU allocator cannot be watched: it has no deleter of its own")
        weakref.finalize(self, self._library.xconv_forget, self._index)

    @property
    def most(self) -> int:
        """The most bytes that were alive at once since the beginning, or the last `restart`."""
        return int(self._library.xconv_most(self._index))

    @property
    def live(self) -> int:
        """Bytes that were allocated since the beginning, and are alive."""
        return int(self._library.xconv_live(self._index))

    def restart(self) -> None:
        """Look for the maximum of what comes."""
        self._library.xconv_restart(self._index)

    def owns(self, address: int, tensor: object = None) -> bool:
        """Whether the block at this address, which is the tensor's, was allocated since the beginning."""
        return bool(self._library.xconv_owns(self._index, address))

    def disown(self, address: int, tensor: object = None) -> int:
        """Count this block no longer, as if it had been there before. Its bytes, 0 when it was."""
        return int(self._library.xconv_disown(self._index, address))

    def end(self) -> None:
        """Put the allocator back, unless another watch goes on."""
        self._library.xconv_end(self._index)


def pause(on: bool) -> None:
    """Do not count, in any watch, what is allocated until it is called with False as often as with True."""
    _library().xconv_pause(1 if on else -1)
