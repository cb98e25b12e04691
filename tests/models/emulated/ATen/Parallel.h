// Stands in for torch's header in a program without torch: one thread. Used by tests/models/test_kernels.py.

#pragma once

#include <cstdint>

namespace at {

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
    if (begin < end) work(begin, end);
}

inline int get_num_threads() { return 1; }
inline int get_thread_num() { return 0; }

}  // namespace at
