// Calls one C++ kernel in a program of its own, which an emulator can run: the tensors' bytes in, the same tensors' bytes out.
//
//     main FUNCTION SIZE ..   with the tensors one after the other in standard input, each after its number of bytes (int64)
//
// Built, with the kernels' sources, and called by tests/models/test_kernels.py.

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

extern "C" {
int lmu_attention_forward_float32(int64_t, int64_t, int64_t, int64_t, float*, float*, float*, float);
int lmu_attention_backward_float32(int64_t, int64_t, int64_t, int64_t, float*, float*, float*, float*, float);
int lmu_convolve_forward_float32(int64_t, int64_t, int64_t, int64_t, int64_t, float*, float*, float*, float*);
int lmu_convolve_backward_float32(int64_t, int64_t, int64_t, int64_t, int64_t, float*, float*, float*, float*, float*, float*);
}

int main(int, char** arguments) {
    std::string function = arguments[1];
    std::vector<int64_t> n;
    for (char** size = arguments + 2; *size; ++size) n.push_back(std::atoll(*size));
    std::vector<std::vector<char>> tensors;
    for (int64_t bytes; std::cin.read(reinterpret_cast<char*>(&bytes), sizeof bytes);) {
        tensors.emplace_back(bytes);
        std::cin.read(tensors.back().data(), bytes);
    }
    auto t = [&](int i) { return reinterpret_cast<float*>(tensors[i].data()); };
    int error = 1;
    if (function == "lmu_attention_forward")
        error = lmu_attention_forward_float32(n[0], n[1], n[2], n[3], t(0), t(1), t(2), 1.0f);
    if (function == "lmu_attention_backward")
        error = lmu_attention_backward_float32(n[0], n[1], n[2], n[3], t(0), t(1), t(2), t(3), 1.0f);
    if (function == "lmu_convolve_forward")
        error = lmu_convolve_forward_float32(n[0], n[1], n[2], n[3], n[4], t(0), t(1), t(2), t(3));
    if (function == "lmu_convolve_backward")
        error = lmu_convolve_backward_float32(n[0], n[1], n[2], n[3], n[4], t(0), t(1), t(2), t(3), t(4), t(5));
    for (const std::vector<char>& tensor : tensors) std::cout.write(tensor.data(), tensor.size());
    return error;
}
