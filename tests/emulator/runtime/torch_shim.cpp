// What a CUDA room asks torch, answered for CPU tensors while it runs: they are on cuda:0, which has a stream. All
// other calls pass through. The extension finds these before torch's own, since it is linked to this library first.
#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "stand_in.h"

namespace {

template <class F>
F* in_torch(F*, const char* name) {
    static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<F*>(dlsym(torch, name));
}
#define REAL(name) ([] { static auto* const found = in_torch(&name, #name); return found; }())

constexpr int32_t kCpu = 0, kCuda = 1;   // c10::DeviceType

uint64_t address_of(AtenTensorHandle tensor) {
    const void* data = nullptr;
    REAL(torch_get_const_data_ptr)(tensor, &data);
    return reinterpret_cast<uint64_t>(data);
}

bool plain(AtenTensorHandle tensor) {
    int32_t type = -1;
    REAL(aoti_torch_get_device_type)(tensor, &type);
    return type == kCpu;
}

// From the first element to the end of the last.
void tell(AtenTensorHandle tensor, bool blank) {
    if (!stand_in.in_room || !stand_in.memory || !plain(tensor)) return;
    int64_t dims = 0, *sizes = nullptr, *strides = nullptr, extent = 1;
    int32_t dtype = 0;
    aoti_torch_get_dim(tensor, &dims);
    aoti_torch_get_sizes(tensor, &sizes);
    aoti_torch_get_strides(tensor, &strides);
    aoti_torch_get_dtype(tensor, &dtype);
    for (int64_t d = 0; d < dims; ++d) {
        if (sizes[d] == 0) return;
        extent += (sizes[d] - 1) * strides[d];
    }
    const uint64_t element = aoti_torch_dtype_element_size(dtype);
    const StandInMemory memory{address_of(tensor), uint64_t(extent) * element, uint32_t(element), blank};
    if (blank) memset(reinterpret_cast<void*>(memory.address), 0xff, memory.bytes);   // nan
    stand_in.memory(&memory);
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
    const AOTITorchError error = REAL(aoti_torch_get_device_type)(tensor, type);
    if (!error && stand_in.in_room && *type == kCpu && !(stand_in.host && address_of(tensor) == stand_in.host)) {
        *type = kCuda;
    }
    return error;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
    const AOTITorchError error = REAL(aoti_torch_get_device_index)(tensor, index);
    if (!error && stand_in.in_room && plain(tensor)) *index = 0;
    return error;
}

AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
    const AOTITorchError error = REAL(torch_get_const_data_ptr)(tensor, data);
    if (!error) tell(tensor, false);
    return error;
}

AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
    const AOTITorchError error = REAL(torch_get_mutable_data_ptr)(tensor, data);
    if (!error) tell(tensor, false);
    return error;
}

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
    const bool ours = stand_in.in_room && device_type == kCuda;
    const int32_t type = ours ? kCpu : device_type, index = ours ? 0 : device_index;
    const AOTITorchError error =
        REAL(aoti_torch_empty_strided)(dims, sizes, strides, dtype, type, index, made);
    if (!error && ours) tell(*made, true);
    return error;
}

AOTITorchError aoti_torch_create_tensor_from_blob_v2(void* data, int64_t dims, const int64_t* sizes,
                                                     const int64_t* strides, int64_t offset, int32_t dtype,
                                                     int32_t device_type, int32_t device_index,
                                                     AtenTensorHandle* made, int32_t layout,
                                                     const uint8_t* metadata, int64_t metadata_size) {
    const int32_t type = stand_in.in_room && device_type == kCuda ? kCpu : device_type;
    return REAL(aoti_torch_create_tensor_from_blob_v2)(data, dims, sizes, strides, offset, dtype, type, device_index,
                                                       made, layout, metadata, metadata_size);
}

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
    if (!stand_in.in_room) return REAL(aoti_torch_create_device_guard)(index, guard);
    ++stand_in.guards;
    *guard = reinterpret_cast<DeviceGuardHandle>(&stand_in);
    return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
    if (guard != reinterpret_cast<DeviceGuardHandle>(&stand_in)) return REAL(aoti_torch_delete_device_guard)(guard);
    --stand_in.guards;
    return 0;
}

AOTITorchError aoti_torch_get_current_stream(int32_t index, StreamHandle* stream) {
    if (!stand_in.in_room) return REAL(aoti_torch_get_current_stream)(index, stream);
    *stream = reinterpret_cast<StreamHandle>(&stand_in);
    return 0;
}

AOTITorchError aoti_torch_delete_stream(StreamHandle stream) {
    return stream == reinterpret_cast<StreamHandle>(&stand_in) ? 0 : REAL(aoti_torch_delete_stream)(stream);
}

AOTITorchError torch_stream_native_handle(StreamHandle stream, void** handle) {
    if (stream != reinterpret_cast<StreamHandle>(&stand_in)) return REAL(torch_stream_native_handle)(stream, handle);
    *handle = reinterpret_cast<void*>(kStream);
    return 0;
}

}  // extern "C"
