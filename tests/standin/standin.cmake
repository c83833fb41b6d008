# Libraries that simulate CUDA on host memory, for tests. See driver.py and torch_device.py.

add_library(cuda_standin MODULE ${CMAKE_CURRENT_LIST_DIR}/cuda_driver.cc)
# Once loaded, it is what dlopen finds under the driver's name.
target_link_options(cuda_standin PRIVATE -Wl,-soname,libcuda.so.1)

add_library(torch_cuda_standin MODULE ${CMAKE_CURRENT_LIST_DIR}/torch_device.cc)
target_include_directories(torch_cuda_standin SYSTEM PRIVATE ${TORCH}/include)
target_link_options(torch_cuda_standin PRIVATE -Wl,--no-undefined)
target_link_libraries(torch_cuda_standin PRIVATE ${TORCH}/lib/libc10.so ${TORCH}/lib/libtorch_cpu.so)

install(TARGETS cuda_standin torch_cuda_standin LIBRARY DESTINATION torchcall/standin)
