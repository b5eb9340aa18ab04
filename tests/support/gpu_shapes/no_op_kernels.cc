// Kernels that do nothing, under the names of operators for which Paddle's CPU wheel has none. An operator of a static
// program is refused where no kernel is registered for its types; with these, Paddle goes on to infer shapes and types.
//
// tests/support/gpu_shapes compiles and loads this file.

#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_factory.h"

namespace {

// More than any operator has; the ones that are not needed are ignored.
constexpr int kInputs = 16, kOutputs = 10;

void NoOp(phi::KernelContext*) {}
void NoOpVariadic(void*) {}

}  // namespace

// Registers `operator_name` for a number of phi::DataType. False if it has such a kernel already.
extern "C" bool register_no_op(const char* operator_name, int data_type) {
  const phi::KernelKey key(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, static_cast<phi::DataType>(data_type));
  auto& kernels = phi::KernelFactory::Instance().kernels()[operator_name];
  if (kernels.count(key)) return false;
  phi::Kernel kernel(NoOp, reinterpret_cast<void*>(&NoOpVariadic));
  for (int i = 0; i < kInputs; ++i) {
    kernel.mutable_args_def()->AppendInput(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, phi::DataType::UNDEFINED,
                                           std::type_index(typeid(const phi::DenseTensor&)));
  }
  for (int i = 0; i < kOutputs; ++i) {
    kernel.mutable_args_def()->AppendOutput(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, phi::DataType::UNDEFINED,
                                            std::type_index(typeid(phi::DenseTensor*)));
  }
  kernels[key] = kernel;
  return true;
}
