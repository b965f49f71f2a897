// PyTorch's CPU build asks for a guard of the CUDA device before it makes a tensor there: this one does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
