import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # Input block
        self.conv1 = nn.Conv2d(1, 16, 3, bias=False)  # 28 -> 26
        self.conv2 = nn.Conv2d(16, 32, 3, bias=False)  # 26 -> 24
        self.conv3 = nn.Conv2d(32, 64, 3, bias=False)  # 24 -> 22

        # Transition block
        self.pool1 = nn.MaxPool2d(2, 2)  # 22 -> 11
        self.conv4 = nn.Conv2d(64, 32, 1, bias=False)

        self.conv5 = nn.Conv2d(32, 32, 3, bias=False)  # 11 -> 9
        self.conv6 = nn.Conv2d(32, 32, 3, bias=False)  # 9 -> 7

        # Output block
        self.conv7 = nn.Conv2d(32, 10, 1, bias=False)
        self.conv8 = nn.Conv2d(10, 10, 7, bias=False)  # 7 -> 1

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        x = self.pool1(x)
        x = F.relu(self.conv4(x))
        x = F.relu(self.conv6(F.relu(self.conv5(x))))
        x = F.relu(self.conv7(x))
        x = self.conv8(x)  # never a ReLU on the last layer
        x = x.view(-1, 10)
        return F.log_softmax(x, dim=-1)
